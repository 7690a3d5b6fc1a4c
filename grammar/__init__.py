"""The grammar and the prelude: data, read with importlib.resources."""
