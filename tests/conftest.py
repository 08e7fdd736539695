"""For every test: properties are about results, never about how fast a busy machine is."""

from hypothesis import HealthCheck, settings

settings.register_profile("birthmark", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("birthmark")
