"""Commands that make certificates."""

from pathlib import Path
from typing import Annotated

import typer

from kvrelay.cli.setting_options import takes_settings
from kvrelay.cli.views.output import print_note
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.config.sources import SettingsSources
from kvrelay.errors import ConfigError

app = typer.Typer(help="Certificates of a cluster's processes.", no_args_is_help=True)


@app.callback()
def certificates() -> None:
    """Certificates of a cluster's processes."""


@app.command("dev")
@takes_settings(SecuritySettings, only={"trust_domain"})
def dev(
    sources: SettingsSources,
    folder: Annotated[Path, typer.Argument(help="Folder for CA, certificates and keys.")],
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="Name or address of gateways, fronts and Redis besides localhost; repeatable."),
    ] = None,
    days: Annotated[int, typer.Option("--days", min=1, max=3650, help="Days that certificates are valid.")] = 365,
    force: Annotated[bool, typer.Option("--force", help="Renew the certificates under the folder's CA.")] = False,
    new_ca: Annotated[
        bool, typer.Option("--new-ca", help="Make a new CA and certificates; the CA before it stays trusted.")
    ] = False,
    forget_old_ca: Annotated[
        bool, typer.Option("--forget-old-ca", help="Trust the current CA only; keep its certificates.")
    ] = False,
) -> None:
    """Make a CA and a certificate for each role.

    For trials and small clusters. In production, SPIRE, cert-manager or step-ca write the files.
    """
    if force + new_ca + forget_old_ca > 1:
        raise ConfigError("--force, --new-ca and --forget-old-ca are different steps: give one of them")
    # cryptography is slow to import
    from kvrelay.security import certificates

    settings = sources.load("gateway", SecuritySettings)
    plan = certificates.CertificatePlan(settings.trust_domain, tuple(host or ()), days)
    try:
        if forget_old_ca:
            certificates.forget_earlier_authorities(folder)
        elif new_ca:
            certificates.replace_authority(folder, plan)
        elif force:
            certificates.renew_certificates(folder, plan)
        else:
            certificates.make_certificates(folder, plan)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose a folder of your own") from None
    print(folder)
    print_note(f"{certificates.CA_KEY_FILE} signs certificates: keep it where no server can read it")
