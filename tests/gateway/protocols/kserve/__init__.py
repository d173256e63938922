"""Tests of gateway/protocols/kserve."""
