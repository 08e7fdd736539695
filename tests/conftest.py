"""For every test: properties are about results, never about how fast a busy machine is."""

from hypothesis import settings

settings.register_profile("birthmark", deadline=None)
settings.load_profile("birthmark")
