"""Search in an index over HTTP: an API and a page. `amclr serve` starts it; needs the extra `serve`."""
