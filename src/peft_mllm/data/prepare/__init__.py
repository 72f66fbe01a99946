"""From a data set as its owners publish it to one folder that a task reads: found, checked, extracted, sealed."""
