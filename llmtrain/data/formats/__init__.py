"""Files of tokens of other frameworks: from them and to them."""
