"""How the ranks are divided: the degrees of every axis, a rank's part of the model, and what fits."""
