"""Log writers: each public module here has a class `Writer` that follows `tracking.log.Writer`."""
