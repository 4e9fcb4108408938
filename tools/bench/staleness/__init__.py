"""What staleness costs each method: a study in one process, many times over."""
