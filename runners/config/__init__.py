"""The configuration: settings as dataclasses, built and checked from conf/ and the command line."""
