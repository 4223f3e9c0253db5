"""The way from recorded events to a model. README.md lists the modules in reading order."""
