"""House language models: trained here once, looked into by many papers."""
