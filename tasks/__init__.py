"""The stages, a folder each: `python -m tasks.<stage>`. What they share is in core/ and, shipped in packages, in runtime/."""
