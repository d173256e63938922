"""Tests of gateway/kserve."""
