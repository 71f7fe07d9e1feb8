"""The outside world: Amplify, Recurly, and whoever is told."""
