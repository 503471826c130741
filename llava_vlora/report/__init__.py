"""Reports, built afterwards from the files in a run folder."""
