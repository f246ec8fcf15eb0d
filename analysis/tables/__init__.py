"""The tables of a study, and the page that shows everything together."""
