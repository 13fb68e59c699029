"""`sdsearch plan`: memory per GPU, by part, of a run that has not begun; nothing is loaded and no GPU is needed."""
