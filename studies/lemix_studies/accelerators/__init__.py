"""Profiles of models that nobody here can run, on accelerators that nobody here has: a roofline of public figures."""

from lemix_studies.accelerators.devices import DEVICES, Device
from lemix_studies.accelerators.models import MODELS, Model
from lemix_studies.accelerators.roofline import Trained, profile_of

__all__ = ["DEVICES", "MODELS", "Device", "Model", "Trained", "profile_of"]
