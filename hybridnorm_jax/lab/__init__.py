"""The lab: compare norm placements, and report what was found."""
