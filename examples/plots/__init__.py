"""The pictures of the documents, one file each; ``python -m examples.gallery`` makes them all."""
