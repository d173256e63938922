"""Settings: what all groups of settings are made of."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
