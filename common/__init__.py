"""What two processes must agree on: messages, codec, versions, rejection, configuration. No torch here."""
