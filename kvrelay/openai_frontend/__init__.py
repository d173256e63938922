"""OpenAI's HTTP API in front of gateways: our front checks requests, smg serves the API."""
