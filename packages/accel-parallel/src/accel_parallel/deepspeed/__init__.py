"""DeepSpeed as a strategy: its configuration, its engine, and what surrounds them. Imports it only when it is used."""
