"""The methods that QuantEase is compared with, one file each. Imports torch and quantease only."""
