"""Our own backends, reached only through entry points; no module here imports another of them."""
