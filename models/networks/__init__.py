"""U-Nets and transformers."""
