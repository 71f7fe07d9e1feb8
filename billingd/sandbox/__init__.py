"""A local Amplify and Recurly to rehearse against; knows nothing of the daemon."""
