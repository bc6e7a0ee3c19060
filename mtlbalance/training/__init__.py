"""One run: data, model, balancer and optimiser through the study's cadence, recorded and resumable."""
