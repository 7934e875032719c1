"""What several config files share and what is not worth reading twice."""
