"""What is trained on: indexes made offline, and the plan of every step computed from them."""
