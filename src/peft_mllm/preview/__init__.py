"""The preview of a data set: one HTML page that shows records as a model reads them."""
