"""A model loaded to answer: from Python, for files of questions, over HTTP, on a web page."""
