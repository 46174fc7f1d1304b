"""What goes out with a file: bundle, model card, Modelfile, report."""
