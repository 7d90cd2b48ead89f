"""Reports: what a run did, what graphs cost, side by side; as data, text and tables."""
