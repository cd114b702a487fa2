"""The dream as gymnasium environments."""
