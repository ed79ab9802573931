"""Where text comes from: files, archives, URLs and data sets, as documents and bad records."""
