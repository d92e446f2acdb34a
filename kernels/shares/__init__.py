"""Equal shares of a decode step's live pages for all programs, and the reduction that joins what they sum up."""
