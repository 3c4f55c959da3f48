#!/usr/bin/env bash
# MLflow on a cluster's head: artifacts in the bucket, the database on this disk with a copy in the bucket every ten
# minutes, from which a new head starts.   bash deploy/mlflow_server.sh s3://bucket/mlflow
set -euo pipefail
location=${1:?give the location of artifacts, e.g. s3://bucket/mlflow}
folder=$HOME/mlflow
mkdir -p "$folder"
if pgrep -f "mlflow server" > /dev/null; then exit 0; fi

copy() { # copy FROM TO, between this disk and the bucket
    python - "$1" "$2" <<'PYTHON'
import sys
from pyarrow import fs
fs.copy_files(sys.argv[1], sys.argv[2])
PYTHON
}

is_there() { # is_there URI: yes or no; the script ends where the bucket does not say
    python - "$1" <<'PYTHON'
import sys
from pyarrow import fs
system, path = fs.FileSystem.from_uri(sys.argv[1])
print("no" if system.get_file_info(path).type == fs.FileType.NotFound else "yes")
PYTHON
}

# Not from an empty database where the copy cannot be read now: in ten minutes it would take the copy's place.
if [ ! -f "$folder/mlflow.db" ]; then
    found=$(is_there "$location/mlflow.db") || { echo "cannot read $location: MLflow is not started"; exit 1; }
    if [ "$found" = yes ]; then
        copy "$location/mlflow.db" "file://$folder/copy.db"
        mv "$folder/copy.db" "$folder/mlflow.db"
    fi
fi
nohup mlflow server --workers 1 --host 0.0.0.0 --port 5000 --allowed-hosts "mlflow:5000,localhost:5000,127.0.0.1:5000" \
    --backend-store-uri "sqlite:///$folder/mlflow.db" --artifacts-destination "$location" > "$folder/server.log" 2>&1 &
(
    while sleep 600; do
        python -c 'import sqlite3, sys; sqlite3.connect(sys.argv[1]).backup(sqlite3.connect(sys.argv[2]))' \
            "$folder/mlflow.db" "$folder/copy.db" && copy "file://$folder/copy.db" "$location/mlflow.db"
    done
) > "$folder/copy.log" 2>&1 &
