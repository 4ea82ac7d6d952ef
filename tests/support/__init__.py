"""Helpers of the tests: small models, servers, recorded results, fakes of missing hardware."""
