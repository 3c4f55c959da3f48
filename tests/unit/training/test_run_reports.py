"""What Ray Train is told of a run: every whole state, and one more where a machine is about to be taken."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines import storage
from pipelines.miniature.tiny_training import train_settings
from pipelines.training.job import resolve_job
from pipelines.training.worker import train_loop
from tinygptv.checkpoint.folders import verify_folder


@dataclass
class Recorded:
    """Reports that are kept; a notice comes at the reading with this number."""

    notice_at: int = -1
    asked: int = 0
    told: list[tuple[int, str]] = field(default_factory=list)

    def saved(self, metrics, location):
        if location:
            verify_folder(location)  # what is told is whole
        self.told.append((int(metrics["next_step"]), location))

    def must_save(self):
        self.asked += 1
        return self.asked == self.notice_at


def run(world, tmp_path, reports):
    settings = train_settings(world, tmp_path, checkpoint_every=5, log_every=1, max_steps=11)
    job, _ = resolve_job(settings, 4)
    train_loop(job, reports)
    return tmp_path / "states"


def test_every_state_is_told_once_it_is_whole(world, tmp_path):
    reports = Recorded()
    states = run(world, tmp_path, reports)
    assert [step for step, _ in reports.told] == [5, 10]
    assert reports.told[1][1] == str(states / "step-00000005"), "the newest whole one; that of step 10 is being written"


def test_a_notice_saves_at_once(world, tmp_path):
    reports = Recorded(notice_at=7)
    states = run(world, tmp_path, reports)
    assert [step for step, _ in reports.told] == [5, 7, 10]
    assert reports.told[1][1] == str(states / "step-00000007")
    assert storage.exists(str(states / "step-00000007"))
