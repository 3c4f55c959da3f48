"""The model over HTTP: Ray Serve, OpenAI's protocol, images from strangers, the web page."""
