"""What tako measures of itself alone."""
