"""The stock SGLang wheel on a machine without a GPU: how it is installed."""
