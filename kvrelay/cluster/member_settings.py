"""Adapts the user's settings to one process of a cluster on this machine."""

import os
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from kvrelay.client import TLS
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.config.settings import DecodeSettings, GatewaySettings, OpenAISettings, PrefillSettings
from kvrelay.core.member import MemberRole
from kvrelay.runtime.cpu_cores import default_core_sharing_file, divide_cores, format_cores, processor_share
from kvrelay.security.cluster_key import ClusterKey, ClusterKeyFile
from kvrelay.security.principal import Role
from kvrelay.security.role_names import server_name

SettingsT = TypeVar("SettingsT", GatewaySettings, PrefillSettings, DecodeSettings)
WorkerSettingsT = TypeVar("WorkerSettingsT", PrefillSettings, DecodeSettings)
SecuredT = TypeVar("SecuredT", GatewaySettings, PrefillSettings, DecodeSettings, OpenAISettings)


def with_cores(settings: WorkerSettingsT, num_workers: int, number: int) -> WorkerSettingsT:
    """Engines that share cores slow each other down. Idle cores are lent."""
    if settings.engine.num_threads is not None or settings.engine.cores is not None:
        return settings
    share = processor_share()
    if share.quota is not None:
        return _with_engine(settings, num_threads=max(1, share.num_threads // max(1, num_workers)))
    shares = divide_cores(share.cores, num_workers)
    if number >= num_workers or not shares[number]:
        return _with_engine(settings, num_threads=max(1, share.num_threads // max(2, num_workers)))
    sharing_file = settings.engine.core_sharing_file or default_core_sharing_file()
    return _with_engine(settings, cores=format_cores(shares[number]), core_sharing_file=sharing_file)


def with_server(settings: SettingsT, **changes: object) -> SettingsT:
    return settings.model_copy(update={"server": settings.server.model_copy(update=changes)})


def with_certificates(settings: SecuredT, folder: str | None, role: str) -> SecuredT:
    if folder is None:
        return settings
    security = settings.security.model_copy(update={"tls_folder": folder})
    return settings.model_copy(update={"security": security.of_role(role)})


def with_cluster_key(settings: SecuredT, key: ClusterKeyFile | None) -> SecuredT:
    security = settings.security
    path = None if key is None else key.path
    if path is None or security.has_certificates or security.cluster_key_file is not None:
        return settings
    return settings.model_copy(update={"security": security.model_copy(update={"cluster_key_file": path})})


def operator_tls(folder: str | None, trust_domain: str) -> TLS | None:
    """For the owner's questions to gateways of this cluster, which certificates name."""
    if folder is None:
        return None
    ca, certificate, key = (os.path.join(folder, name) for name in ("ca.pem", "operator.pem", "operator.key"))
    return TLS(ca, certificate, key, server_name(MemberRole.GATEWAY.value, trust_domain))


def operator_prover(gateway: SecuritySettings, key: ClusterKeyFile | None) -> Callable[[str], str] | None:
    """Likewise without certificates, where clients need keys: makes a key for a call to an address."""
    if not gateway.takes_keys or key is None or key.path is None:
        return None
    return partial(ClusterKey.read(gateway.cluster_key_file or key.path).proof_of, Role.OPERATOR)


def with_peers(settings: GatewaySettings, **changes: object) -> GatewaySettings:
    return settings.model_copy(update={"peers": settings.peers.model_copy(update=changes)})


def of_another(settings: SettingsT) -> SettingsT:
    """For one more process: the named ports are taken."""
    http_port = None if settings.server.http_port is None else 0
    return with_server(settings, port=0, http_port=http_port, advertise_address=None)


def _with_engine(settings: WorkerSettingsT, **changes: object) -> WorkerSettingsT:
    return settings.model_copy(update={"engine": settings.engine.model_copy(update=changes)})
