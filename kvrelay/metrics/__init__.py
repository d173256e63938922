"""What a process counts and how it is served for Prometheus.

`families` is what the code counts with, and imports nothing; `exposition` turns it into a page when somebody scrapes, and only it
imports prometheus_client.
"""
