"""Change of basis: rewrites that keep the function and choose the channels that the removal then finds."""
