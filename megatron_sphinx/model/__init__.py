"""What is computed: frozen vision encoders, their mixture, the language model."""
