"""A run's configuration: RunConfig and its sections, read from YAML and from key=value, written back, compared.

ModelConfig and DistributedSection, two of its sections, stand beside what they configure, in model and in mesh.
"""
