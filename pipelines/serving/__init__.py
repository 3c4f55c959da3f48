"""The model over HTTP: Ray Serve, OpenAI's API, untrusted images, the web page."""
