"""The mathematics of unCLIP: networks, diffusion, priors, decoders; it imports no other folder."""
