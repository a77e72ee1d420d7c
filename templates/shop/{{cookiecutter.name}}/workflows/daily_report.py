from tako_runtime import SyncStep, workflow

from services import Sales, mail_report, sales_of, yesterday


# A plain `def` may block: it runs in a thread of its own, and so does each of its steps.
@workflow("daily-report", schedule="0 9 * * *", timezone="UTC")
def daily_report(payload: None, step: SyncStep) -> Sales:
    """Mail yesterday's sales, every day at 9."""
    # The date is a step too, for it is not the same each time one asks: a retry after midnight must still report the
    # day that the first attempt began with.
    day = step.run("day", yesterday)
    sales = step.run("collect", sales_of, day, retries=3)
    step.run("mail", mail_report, day, sales)
    return sales
